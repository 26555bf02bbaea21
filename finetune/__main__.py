"""`python -m finetune`: the same as `finetune`."""

from finetune.cli import entry

if __name__ == "__main__":
    entry()
