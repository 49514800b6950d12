# `make reproduce` runs the notebooks on a small real model; `make test` runs every test. Both need only
# Python 3.11 or newer, make and git, and install the rest into .venv.

PYTHON ?= python3
RECIPE ?= proxy
DATASET ?=
RUN ?=

.PHONY: setup reproduce test soak lab playground figures readme notebooks bench llama-factory

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# make reproduce [RECIPE=tiny|proxy|paper|FILE] [DATASET=mine.md] [RUN=runs/mine]
reproduce: setup
	.venv/bin/mini-symposium reproduce --recipe '$(RECIPE)' $(if $(RUN),--run '$(RUN)') $(if $(DATASET),-p 'DATASET=$(DATASET)')

# what the tests need, what exports GGUF files and runs them, and what spreads a sweep over machines
.venv/extras: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,release,ray]'
	touch $@

# Two groups of tests at a time, with one thread each: tests start kernels, servers and a browser, and with more threads
# than cores they would take many times as long.
test: .venv/extras
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --no-loadscope-reorder --durations=10

# 25 times as many hostile inputs, different each time, and a kill at every change to a file: an hour or more
soak: .venv/extras
	.venv/bin/python -m pytest tests/test_hostile_input.py tests/test_hostile_models.py tests/test_interrupted.py \
		-m 'soak or not soak' --hypothesis-profile=soak

# step through the notebooks
lab: setup
	.venv/bin/jupyter lab notebooks

# notebook 07 as a web page [RUN=runs/mine] [RECIPE=half]; without a run of the recipe, its base alone
PLAYED = $(or $(RUN),$(patsubst %/recipe.yml,%,$(wildcard runs/$(RECIPE)/recipe.yml)),$(RECIPE))
playground: setup
	MINI_SYMPOSIUM_RUN='$(if $(or $(RUN),$(wildcard $(PLAYED))),$(abspath $(PLAYED)),$(PLAYED))' \
		.venv/bin/voila notebooks/07_playground.ipynb

# redraw figures/ from the committed metrics, without torch
figures: setup
	.venv/bin/mini-symposium figures figures/proxy figures/claims figures/curve figures/examples
	PYTHONPATH=tests .venv/bin/python -m bench --redraw figures/bench-cpu.json

# write the results in README.md from the committed data, and the project's address into the notebooks
readme: setup
	PYTHONPATH=tests .venv/bin/python -m readme
	PYTHONPATH=tests .venv/bin/python -m address

# put the outputs of runs/proxy into notebooks/, and its metrics and figures into figures/
notebooks: reproduce
	.venv/bin/mini-symposium publish runs/proxy

# make bench [ONLY=step,grid] [SAVE=figures/bench-cpu]: speed and memory against other trainers, which get an environment
# of their own; about 15 minutes on two cores
# make bench DEVICE=cuda [REHEARSE=1]: a card, at Mistral-7B's shape, at most 12 minutes; or its rehearsal on a CPU
bench: setup $(if $(filter cuda,$(DEVICE)),,.venv-bench/installed)
	PYTHONPATH=tests .venv/bin/python -m bench $(if $(ONLY),--only '$(ONLY)') $(if $(SAVE),--save '$(SAVE)') \
		$(if $(DEVICE),--device '$(DEVICE)') $(if $(REHEARSE),--rehearse)

.venv-bench/installed: tests/bench/peers/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# one more peer of `make bench`, in an environment of its own
llama-factory: .venv-llama-factory/installed

# Its packages for audio and vision need CUDA's libraries, and are not used here.
.venv-llama-factory/installed: tests/bench/peers/llama_factory_requirements.txt
	$(PYTHON) -m venv .venv-llama-factory
	.venv-llama-factory/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-llama-factory/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@
