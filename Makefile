# LAPA end to end: `make` builds everything below from scratch; `make help` lists the targets.
PYTHON ?= python3
DATA   ?= data/tabletop
OUT    ?= runs/demo
PRESET ?= tiny
NPROC  ?= 1
SEED   ?= 0
ARGS   ?=
STAGES := quantize base pretrain finetune scratch
PY     := .venv/bin/python
RUN    := $(if $(filter 1,$(NPROC)),$(PY),.venv/bin/torchrun --nproc_per_node $(NPROC))

# Folders may have spaces, colons and apostrophes in their names: recipes quote "$(DATA)" and
# "$(OUT)"; targets begin with $(D) and $(O), where spaces and colons are escaped.
hash  := \#
blank := $(subst ,, )
escape = $(subst :,\:,$(subst $(blank),\ ,$1))
$(foreach c,$(hash) ; = ? * | [ ] % \ $$ ` ",$(if $(findstring $c,$(value DATA)$(value OUT)), \
  $(error DATA=$(value DATA) OUT=$(value OUT): make cannot take $c in the name of a folder)))
override DATA := $(if $(findstring $(blank),$(DATA)),$(DATA),$(patsubst ./%,%,$(DATA:/=)))
D := $(call escape,$(DATA))
O := $(call escape,$(OUT))

# The built-in data also has a base phase, a split of its instructions and rollouts.
BUILTIN := $(filter data/tabletop data/human,$(subst $(blank),|,$(DATA)))
BASE    := $(if $(BUILTIN),--init_from "$(OUT)/base")
SEEN    := $(if $(BUILTIN),--where combination=seen)

# $(call options,STAGE): of every stage; ARGS reach those that are named on the command line.
named    = $(if $(filter $1,$(MAKECMDGOALS)),$(ARGS))
options  = --out "$(OUT)/$1" --preset $(PRESET) --seed $(SEED) --resume true $(call named,$1)

BENCHES := bench bench-compiled bench-gpu memory
.PHONY: all help setup data $(STAGES) evaluate table test lint $(BENCHES) clean
all: $(if $(BUILTIN),evaluate,finetune)
help:
	@echo "make [setup data $(STAGES) evaluate table clean test lint $(BENCHES)], with"
	@echo "DATA='$(DATA)' OUT='$(OUT)' PRESET=$(PRESET) NPROC=$(NPROC) SEED=$(SEED) ARGS='--steps 500'"

setup: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

data: data/tabletop/episodes.jsonl data/scenes/episodes.jsonl
data/tabletop/episodes.jsonl: | .venv/ready
	$(PY) -m simulators.tabletop data/tabletop --seed 0
data/human/episodes.jsonl: | .venv/ready
	$(PY) -m simulators.tabletop data/human --embodiment human --seed 1
data/scenes/episodes.jsonl: | .venv/ready
	$(PY) -m simulators.tabletop data/scenes --scenes 12000 --seed 2
%/episodes.jsonl:
	@echo "error: $(DATA): no dataset there, expected $(DATA)/episodes.jsonl" >&2; exit 2

# A stage is done when its summary.json is there and newer than what it is made from.
$(STAGES): %: $(O)/%/summary.json
$(O)/quantize/summary.json: $(D)/episodes.jsonl | .venv/ready
	$(RUN) quantize.py --data "$(DATA)" $(call options,quantize)

# The base: what a pretrained vision-language model would know: to describe, then to locate.
CAPTION = $(RUN) pretrain.py --labels caption --data data/scenes --lr 1.5e-3
$(O)/captions/summary.json: data/scenes/episodes.jsonl | .venv/ready
	$(CAPTION) --where task=describe --steps 500 --final_lr 1 $(call options,captions)
$(O)/base/summary.json: $(O)/captions/summary.json
	$(CAPTION) --init_from "$(OUT)/captions" --freeze_vision false --steps 900 $(call options,base)

$(O)/pretrain/summary.json: $(O)/quantize/summary.json $(if $(BUILTIN),$(O)/base/summary.json)
	$(RUN) pretrain.py --labels latent --laq "$(OUT)/quantize" --data "$(DATA)" $(BASE) \
	  $(call options,pretrain)

$(O)/finetune/summary.json: $(O)/pretrain/summary.json
	$(RUN) finetune.py --init_from "$(OUT)/pretrain" --data "$(DATA)" $(SEEN) $(call options,finetune)
$(O)/scratch/summary.json: $(O)/base/summary.json $(D)/episodes.jsonl
	$(RUN) finetune.py --init_from "$(OUT)/base" --data "$(DATA)" $(SEEN) $(call options,scratch)

evaluate: $(O)/evaluate/results.json
$(O)/evaluate/results.json: $(O)/finetune/summary.json $(O)/scratch/summary.json
	$(PY) evaluate.py --policies LAPA="$(OUT)/finetune",SCRATCH="$(OUT)/scratch" \
	  --out "$(OUT)/evaluate" $(call named,evaluate)

# All arms, mean of three seeds; the first seed is the run of `make` itself.
table: | .venv/ready
	baselines/compare.sh "$(OUT)" 0
	baselines/compare.sh runs/table/seed1 1
	baselines/compare.sh runs/table/seed2 2
	$(PY) evaluate.py table --out runs/table/table.md --results \
	  "$(OUT)/arms/results.json",runs/table/seed1/arms/results.json,runs/table/seed2/arms/results.json

test: | .venv/ready
	$(PY) -m pytest -q tests
lint: | .venv/ready
	.venv/bin/ruff format --check . && .venv/bin/ruff check .
$(BENCHES): | .venv/ready
	$(PY) -m benchmarks.bench $(subst bench-,,$(filter-out bench,$@))
clean:
	rm -rf data/tabletop data/human data/scenes runs/demo runs/table .cache
