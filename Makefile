# LAPA end to end.  `make` builds everything below from nothing; `make help` lists the targets.
PYTHON ?= python3
PRESET ?= tiny
OUT    ?= runs/demo
DATA   ?= data/tabletop
NPROC  ?= 1
ARGS   ?=
SEED   ?= 0
# Where a dataset other than the built-in one is given, there is no base phase and no instruction split.
BUILTIN := $(filter data/tabletop data/human,$(DATA))
WHERE   ?= $(if $(BUILTIN),combination=seen)
BASE    ?= $(if $(BUILTIN),$(OUT)/base)
SCENES  := data/scenes

PY  := .venv/bin/python
RUN := $(if $(filter 1,$(NPROC)),$(PY),.venv/bin/torchrun --nproc_per_node $(NPROC))
SAME = --preset $(PRESET) --seed $(SEED) --resume true
FROM = $(if $(BASE),--init_from $(BASE))

.PHONY: all help setup data base quantize pretrain finetune scratch evaluate table test clean
all: evaluate

help:
	@echo "make [quantize|pretrain|finetune|evaluate|table|test|clean] with DATA=$(DATA)"
	@echo "     OUT=$(OUT) PRESET=$(PRESET) NPROC=$(NPROC) SEED=$(SEED) ARGS='--steps 500'"

setup: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

# ------------------------------------------------------------------ data
data: data/tabletop/episodes.jsonl data/scenes/episodes.jsonl
data/tabletop/episodes.jsonl: | .venv/ready
	$(PY) data.py tabletop data/tabletop
data/human/episodes.jsonl: | .venv/ready
	$(PY) data.py tabletop data/human --embodiment human --seed 1
data/scenes/episodes.jsonl: | .venv/ready
	$(PY) data.py tabletop data/scenes --scenes 12000 --seed 2
$(DATA)/episodes.jsonl:
	@echo "error: $(DATA): no dataset there (expected $@)" >&2; exit 2

# ------------------------------------------------------------------ stages
# Each stage is done when its summary.json exists; ARGS reach the stages named on the command line.
named = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS))

quantize: $(OUT)/quantize/summary.json
$(OUT)/quantize/summary.json: $(DATA)/episodes.jsonl | .venv/ready
	$(RUN) quantize.py --data $(DATA) --out $(OUT)/quantize $(SAME) $(call named,quantize)

base: $(OUT)/base/summary.json
$(OUT)/base/summary.json: data/scenes/episodes.jsonl | .venv/ready
	$(RUN) pretrain.py --labels caption --data data/scenes --out $(OUT)/base $(SAME) \
	  --held_out 5 --steps 1200 --lr 1.5e-3 $(call named,base)

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

# ------------------------------------------------------------------ the comparison, three seeds
# One seed is `make arms OUT=runs/table/seed0 SEED=0`: every arm starts from the same base and is
# finetuned on the same labelled episodes; the _human arms never see a robot video before that.
SEEDS ?= 0 1 2
TABLE := runs/table
comma := ,
space := $(subst ,, )
ARMS  := LAPA VPT ACTIONVLA LAPA_human VPT_human ACTIONVLA_human

.PHONY: arms $(SEEDS:%=seed%)
table: $(TABLE)/table.md
$(TABLE)/table.md: | data
	$(MAKE) -j2 OMP_NUM_THREADS=1 $(SEEDS:%=seed%)
	$(PY) evaluate.py table --out $@ \
	  --results $(subst $(space),$(comma),$(SEEDS:%=$(TABLE)/seed%/arms/results.json))
