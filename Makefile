# LAPA end to end.  `make` builds everything below from nothing; `make help` lists the targets.
PYTHON ?= python3
PRESET ?= tiny
OUT    ?= runs/demo
DATA   ?= data/tabletop
NPROC  ?= 1
ARGS   ?=
SEED   ?= 0

# Folders may have blanks in their names: targets escape them, recipes quote them.
empty :=
comma := ,
hash  := \#
blank := $(empty) $(empty)
target = $(subst :,\:,$(subst $(blank),\ ,$(1)))
quote  = '$(subst ','\'',$(1))'
override DATA := $(if $(findstring $(blank),$(DATA)),$(DATA),$(patsubst ./%,%,$(DATA:/=)))
$(foreach c,$(hash) ; = ? * | [ ],$(if $(findstring $(c),$(DATA)$(OUT)),$(error \
  DATA=$(DATA) OUT=$(OUT): make cannot take $(c) in the name of a folder)))
D   := $(call target,$(DATA))
O   := $(call target,$(OUT))
out  = $(call quote,$(OUT)/$(1))

# Another dataset than the built-in one has no base phase, no instruction split and no rollouts.
BUILTIN := $(filter data/tabletop data/human,$(subst $(blank),_,$(DATA)))
WHERE   ?= $(if $(BUILTIN),combination=seen)
BASE    ?= $(if $(BUILTIN),$(OUT)/base)

PY  := .venv/bin/python
RUN := $(if $(filter 1,$(NPROC)),$(PY),.venv/bin/torchrun --nproc_per_node $(NPROC))
SAME = --preset $(PRESET) --seed $(SEED) --resume true
FROM = $(if $(BASE),--init_from $(call quote,$(BASE)))

.PHONY: all help setup data base quantize pretrain finetune scratch evaluate table test bench \
  bench-compiled bench-gpu memory clean
all: $(if $(BUILTIN),evaluate,finetune)

help:
	@echo "make [setup|data|quantize|pretrain|finetune|evaluate|table|test|bench|bench-compiled|bench-gpu|memory|clean]"
	@echo "with DATA=$(D) OUT=$(O) PRESET=$(PRESET) NPROC=$(NPROC) SEED=$(SEED) ARGS='--steps 500'"

setup: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

# ------------------------------------------------------------------ data
data: data/tabletop/episodes.jsonl data/scenes/episodes.jsonl
data/tabletop/episodes.jsonl: | .venv/ready
	$(PY) -m simulators.tabletop data/tabletop --seed 0
data/human/episodes.jsonl: | .venv/ready
	$(PY) -m simulators.tabletop data/human --embodiment human --seed 1
data/scenes/episodes.jsonl: | .venv/ready
	$(PY) -m simulators.tabletop data/scenes --scenes 12000 --seed 2
ifeq ($(BUILTIN),)
$(D)/episodes.jsonl:
	@echo error: $(call quote,$(DATA)): no dataset there, expected $(call quote,$@) >&2; exit 2
endif

# ------------------------------------------------------------------ stages
# Each stage is done when its summary.json exists; ARGS reach the stages named on the command line.
named = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS))

quantize: $(O)/quantize/summary.json
$(O)/quantize/summary.json: $(D)/episodes.jsonl | .venv/ready
	$(RUN) quantize.py --data $(call quote,$(DATA)) --out $(call out,quantize) $(SAME) \
	  $(call named,quantize)

# What a pretrained vision-language model would know: first to describe, then also to locate.
base: $(O)/base/summary.json
CAPTION = $(RUN) pretrain.py --labels caption --data data/scenes --lr 1.5e-3 $(SAME)
$(O)/captions/summary.json: data/scenes/episodes.jsonl | .venv/ready
	$(CAPTION) --out $(call out,captions) --where task=describe --steps 500 --final_lr 1
$(O)/base/summary.json: $(O)/captions/summary.json
	$(CAPTION) --out $(call out,base) --init_from $(call out,captions) --freeze_vision false --steps 900 \
	  $(call named,base)

pretrain: $(O)/pretrain/summary.json
$(O)/pretrain/summary.json: $(O)/quantize/summary.json \
  $(if $(BASE),$(call target,$(BASE))/summary.json)
	$(RUN) pretrain.py --labels latent --laq $(call out,quantize) --data $(call quote,$(DATA)) \
	  --out $(call out,pretrain) $(FROM) $(SAME) $(call named,pretrain)

FINETUNE = $(RUN) finetune.py --data $(call quote,$(DATA)) $(SAME) \
  $(if $(WHERE),--where $(call quote,$(WHERE)))
finetune: $(O)/finetune/summary.json
$(O)/finetune/summary.json: $(O)/pretrain/summary.json
	$(FINETUNE) --init_from $(call out,pretrain) --out $(call out,finetune) $(call named,finetune)

scratch: $(O)/scratch/summary.json
$(O)/scratch/summary.json: $(O)/base/summary.json $(D)/episodes.jsonl
	$(FINETUNE) --init_from $(call out,base) --out $(call out,scratch) $(call named,scratch)

evaluate: $(O)/evaluate/results.json
$(O)/evaluate/results.json: $(O)/finetune/summary.json $(O)/scratch/summary.json
	$(PY) evaluate.py --policies LAPA=$(call out,finetune),SCRATCH=$(call out,scratch) \
	  --out $(call out,evaluate) $(call named,evaluate)

# ------------------------------------------------------------------ the comparison
# `make arms OUT=runs/table/seed1 SEED=1` is one seed of it.  Every arm starts from the same base and is
# finetuned on the same labelled robot episodes; the _human arms see no robot video before that.
ARMS   := VPT ACTIONVLA LAPA_human VPT_human
video   = data/$(if $(findstring human,$(1)),human,tabletop)
LABELS_LAPA      = --labels latent --laq $(call out,quantize-human)
LABELS_VPT       = --labels idm --labelled_data data/tabletop --labelled_where combination=seen
LABELS_ACTIONVLA = --labels action
labels  = $(LABELS_$(firstword $(subst _, ,$(1))))
commas = $(subst |,,$(subst $(blank)|,$(comma),$(1)))

$(O)/quantize-human/summary.json: data/human/episodes.jsonl | .venv/ready
	$(PY) quantize.py --data data/human --out $(call out,quantize-human) $(SAME)

define ARM
$(O)/$(1)/pretrain/summary.json: $(O)/base/summary.json data/tabletop/episodes.jsonl \
  $(call video,$(1))/episodes.jsonl $(if $(findstring LAPA,$(1)),$(O)/quantize-human/summary.json)
	$(PY) pretrain.py --data $(call video,$(1)) $(call labels,$(1)) --init_from $(call out,base) \
	  --out $(call out,$(1)/pretrain) $(SAME)
$(O)/$(1)/finetune/summary.json: $(O)/$(1)/pretrain/summary.json
	$(FINETUNE) --init_from $(call out,$(1)/pretrain) --out $(call out,$(1)/finetune)
endef
$(foreach arm,$(ARMS),$(eval $(call ARM,$(arm))))

.PHONY: arms
arms: $(O)/arms/results.json
$(O)/arms/results.json: $(O)/finetune/summary.json $(O)/scratch/summary.json \
  $(ARMS:%=$(O)/%/finetune/summary.json)
	$(PY) evaluate.py --out $(call out,arms) --seed $(SEED)000 --film 0 --policies \
	  RANDOM=random,SCRATCH=$(call out,scratch),LAPA=$(call out,finetune),$(call commas,$(foreach \
	  a,$(ARMS),|$(a)=$(call out,$(a)/finetune)))

# Two processes of one thread each beat one process of two threads here.  The first seed is the run
# of `make` itself.
SEEDS  := 0 1 2
TABLE  := runs/table
run_of  = $(if $(filter $(SEED),$(1)),$(OUT),$(TABLE)/seed$(1))
table: data data/human/episodes.jsonl
	$(foreach s,$(SEEDS),OMP_NUM_THREADS=1 $(MAKE) -j2 arms \
	  OUT=$(call quote,$(call run_of,$(s))) SEED=$(s) && ) true
	$(PY) evaluate.py table --out $(call quote,$(TABLE)/table.md) \
	  --results $(call quote,$(call commas,$(foreach s,$(SEEDS),|$(call run_of,$(s))/arms/results.json)))

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
