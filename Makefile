# LAPA end to end.  `make` builds everything below from nothing; `make help` lists the targets.
PYTHON ?= python3
PRESET ?= tiny
OUT    ?= runs/demo
DATA   ?= data/tabletop
NPROC  ?= 1
ARGS   ?=
SEED   ?= 0
override DATA := $(DATA:/=)
# Another dataset than the built-in one has no base phase, no instruction split and no rollouts.
BUILTIN := $(filter data/tabletop data/human,$(DATA))
WHERE   ?= $(if $(BUILTIN),combination=seen)
BASE    ?= $(if $(BUILTIN),$(OUT)/base)

PY  := .venv/bin/python
RUN := $(if $(filter 1,$(NPROC)),$(PY),.venv/bin/torchrun --nproc_per_node $(NPROC))
SAME = --preset $(PRESET) --seed $(SEED) --resume true
FROM = $(if $(BASE),--init_from $(BASE))

.PHONY: all help setup data base quantize pretrain finetune scratch evaluate table test bench \
  bench-compiled bench-gpu memory clean
all: $(if $(BUILTIN),evaluate,finetune)

help:
	@echo "make [setup|data|quantize|pretrain|finetune|evaluate|table|test|bench|bench-compiled|bench-gpu|memory|clean]"
	@echo "with DATA=$(DATA) OUT=$(OUT) PRESET=$(PRESET) NPROC=$(NPROC) SEED=$(SEED) ARGS='--steps 500'"

setup: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

# ------------------------------------------------------------------ data
data: data/tabletop/episodes.jsonl data/scenes/episodes.jsonl
data/tabletop/episodes.jsonl: | .venv/ready
	$(PY) data.py tabletop data/tabletop --seed 0
data/human/episodes.jsonl: | .venv/ready
	$(PY) data.py tabletop data/human --embodiment human --seed 1
data/scenes/episodes.jsonl: | .venv/ready
	$(PY) data.py tabletop data/scenes --scenes 12000 --seed 2
ifeq ($(BUILTIN),)
$(DATA)/episodes.jsonl:
	@echo "error: $(DATA): no dataset there (expected $@)" >&2; exit 2
endif

# ------------------------------------------------------------------ stages
# Each stage is done when its summary.json exists; ARGS reach the stages named on the command line.
named = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS))

quantize: $(OUT)/quantize/summary.json
$(OUT)/quantize/summary.json: $(DATA)/episodes.jsonl | .venv/ready
	$(RUN) quantize.py --data $(DATA) --out $(OUT)/quantize $(SAME) $(call named,quantize)

# What a pretrained vision-language model would know: first to describe, then also to locate.
base: $(OUT)/base/summary.json
CAPTION = $(RUN) pretrain.py --labels caption --data data/scenes --lr 1.5e-3 $(SAME)
$(OUT)/captions/summary.json: data/scenes/episodes.jsonl | .venv/ready
	$(CAPTION) --out $(OUT)/captions --where task=describe --steps 500 --final_lr 1
$(OUT)/base/summary.json: $(OUT)/captions/summary.json
	$(CAPTION) --out $(OUT)/base --init_from $(OUT)/captions --freeze_vision false --steps 900 \
	  $(call named,base)

pretrain: $(OUT)/pretrain/summary.json
$(OUT)/pretrain/summary.json: $(OUT)/quantize/summary.json $(if $(BASE),$(BASE)/summary.json)
	$(RUN) pretrain.py --labels latent --laq $(OUT)/quantize --data $(DATA) \
	  --out $(OUT)/pretrain $(FROM) $(SAME) $(call named,pretrain)

FINETUNE = $(RUN) finetune.py --data $(DATA) $(if $(WHERE),--where $(WHERE)) $(SAME)
finetune: $(OUT)/finetune/summary.json
$(OUT)/finetune/summary.json: $(OUT)/pretrain/summary.json
	$(FINETUNE) --init_from $(OUT)/pretrain --out $(OUT)/finetune $(call named,finetune)

scratch: $(OUT)/scratch/summary.json
$(OUT)/scratch/summary.json: $(OUT)/base/summary.json $(DATA)/episodes.jsonl
	$(FINETUNE) --init_from $(OUT)/base --out $(OUT)/scratch $(call named,scratch)

evaluate: $(OUT)/evaluate/results.json
$(OUT)/evaluate/results.json: $(OUT)/finetune/summary.json $(OUT)/scratch/summary.json
	$(PY) evaluate.py --policies LAPA=$(OUT)/finetune,SCRATCH=$(OUT)/scratch \
	  --out $(OUT)/evaluate $(call named,evaluate)

# ------------------------------------------------------------------ the comparison
# `make arms OUT=runs/table/seed1 SEED=1` is one seed of it.  Every arm starts from the same base and is
# finetuned on the same labelled robot episodes; the _human arms see no robot video before that.
ARMS   := VPT ACTIONVLA LAPA_human VPT_human
video   = data/$(if $(findstring human,$(1)),human,tabletop)
LABELS_LAPA      = --labels latent --laq $(OUT)/quantize-human
LABELS_VPT       = --labels idm --labelled_data data/tabletop --labelled_where combination=seen
LABELS_ACTIONVLA = --labels action
labels  = $(LABELS_$(firstword $(subst _, ,$(1))))
comma  := ,
empty  :=
list    = $(subst $(empty) ,$(comma),$(strip $(1)))

$(OUT)/quantize-human/summary.json: data/human/episodes.jsonl | .venv/ready
	$(PY) quantize.py --data data/human --out $(OUT)/quantize-human $(SAME)

define ARM
$(OUT)/$(1)/pretrain/summary.json: $(OUT)/base/summary.json data/tabletop/episodes.jsonl \
  $(call video,$(1))/episodes.jsonl $(if $(findstring LAPA,$(1)),$(OUT)/quantize-human/summary.json)
	$(PY) pretrain.py --data $(call video,$(1)) $(call labels,$(1)) --init_from $(OUT)/base \
	  --out $(OUT)/$(1)/pretrain $(SAME)
$(OUT)/$(1)/finetune/summary.json: $(OUT)/$(1)/pretrain/summary.json
	$(FINETUNE) --init_from $(OUT)/$(1)/pretrain --out $(OUT)/$(1)/finetune
endef
$(foreach arm,$(ARMS),$(eval $(call ARM,$(arm))))

.PHONY: arms
arms: $(OUT)/arms/results.json
$(OUT)/arms/results.json: $(OUT)/finetune/summary.json $(OUT)/scratch/summary.json \
  $(ARMS:%=$(OUT)/%/finetune/summary.json)
	$(PY) evaluate.py --out $(OUT)/arms --seed $(SEED)000 --film 0 --policies $(call list, \
	  RANDOM=random SCRATCH=$(OUT)/scratch LAPA=$(OUT)/finetune \
	  $(foreach a,$(ARMS),$(a)=$(OUT)/$(a)/finetune))

# Two processes of one thread each beat one process of two threads here.  The first seed is the run
# of `make` itself.
SEEDS  := 0 1 2
TABLE  := runs/table
run_of  = $(if $(filter $(SEED),$(1)),$(OUT),$(TABLE)/seed$(1))
table: data data/human/episodes.jsonl
	$(foreach s,$(SEEDS),OMP_NUM_THREADS=1 $(MAKE) -j2 arms OUT=$(call run_of,$(s)) SEED=$(s) && ) true
	$(PY) evaluate.py table --out $(TABLE)/table.md \
	  --results $(call list,$(foreach s,$(SEEDS),$(call run_of,$(s))/arms/results.json))

# ------------------------------------------------------------------ housekeeping
test: | .venv/ready
	$(PY) -m pytest -q tests

bench: | .venv/ready
	$(PY) -m tests.bench

# Tiny networks with and without torch.compile
bench-compiled: | .venv/ready
	$(PY) -m tests.bench compiled

bench-gpu: | .venv/ready
	$(PY) -m tests.bench gpu

# What a 7B needs on 1, 4 and 8 GPUs, computed
memory: | .venv/ready
	$(PY) -m tests.bench memory

clean:
	rm -rf data/tabletop data/human data/scenes runs/demo runs/table .cache
