# make demo          trains a small BoxTeacher on the boxes of drawn shapes and evaluates it: 12 minutes on 2 CPU cores
# make test          runs the tests
# make experiments   compares the paper's methods and ablations on drawn shapes, 3 seeds each: hours; resumes if stopped
# Each first creates .venv, or updates it after a change of requirements.txt.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed
DEMO := runs/demo
# bfloat16 is faster only on CPUs with instructions for it
AMP := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bf16 || echo off)

.PHONY: demo test experiments

demo: $(READY) datasets/shapes
	$(PY) train.py --data shapes --out $(DEMO) --backbone r18-slim --backbone-weights none --channels 64 \
	    --min-size 128 --max-size 128 --teacher-min-size 128 --teacher-max-size 128 \
	    --iters 2200 --batch-size 8 --optimizer adamw --lr 2e-3 --lr-decay cosine --clip-grad 10 --ema 0.99 \
	    --amp $(AMP) --workers 1 --log-every 100 --checkpoint-every 500
	$(PY) evaluate.py --ckpt $(DEMO)/final.pt --data shapes --batch-size 8 \
	    --metrics $(DEMO)/metrics.json --sheet $(DEMO)/sheet.png

test: $(READY)
	$(PY) -m pytest -q tests

experiments: $(READY) datasets/shapes
	$(PY) -m tools.experiments --amp $(AMP)

datasets/shapes: | $(READY)
	$(PY) data.py shapes $@

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
