# make demo   a small BoxTeacher learns masks from the boxes of drawn shapes and is evaluated: 12 minutes on 2 CPU cores
# make test   the tests
# make experiments   the methods and ablations of the paper on drawn shapes, 3 seeds each: hours; goes on where stopped
# All make .venv and install requirements.txt first, where that is missing or older.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed
DEMO := runs/demo
# bfloat16 pays on CPUs that compute in it and is slow on others
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
