"""`python -m finetune`: the same as `finetune`."""

import importlib

if __name__ == "__main__":
    importlib.import_module("finetune.cli").entry()  # by name: entry points don't import each other
