# make demo          masks for boxes in photographs, without training and after it, measured: 15 minutes of one CPU core
# make test          runs the tests
# make experiments   compares the paper's methods and ablations on drawn shapes, 3 seeds each: hours; resumes if stopped
# Each first creates .venv, or updates it after a change of requirements.txt.

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed
DEMO := runs/demo
HELD_OUT := datasets/food/annotations/instances_val2017.json --images datasets/food/val2017
# bfloat16 is faster only on CPUs with instructions for it
AMP := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bf16 || echo off)

.PHONY: demo test experiments

demo: $(READY)
	$(PY) predict.py --boxes $(HELD_OUT) --out $(DEMO)/first-masks --measure
	$(PY) train.py --data food --colors on --out $(DEMO) --backbone r18-slim --backbone-weights none --channels 64 \
	    --min-size 160 192 --max-size 256 --teacher-min-size 192 --teacher-max-size 256 \
	    --iters 900 --ramp 500 --batch-size 8 --optimizer adamw --lr 2e-3 --lr-decay cosine --clip-grad 10 --ema 0.99 \
	    --amp $(AMP) --workers 0 --log-every 100 --eval-every 900 --checkpoint-every 300
	$(PY) predict.py --ckpt $(DEMO)/final.pt --boxes $(HELD_OUT) --out $(DEMO)/trained-masks --measure
	$(PY) evaluate.py --ckpt $(DEMO)/final.pt --data food --batch-size 8 --metrics $(DEMO)/metrics.json
	$(PY) -m tools.compare $(DEMO)/first-masks/masks.json $(DEMO)/trained-masks/masks.json --truth $(HELD_OUT) \
	    --out $(DEMO)/sheet.jpg

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
