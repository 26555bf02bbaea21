"""`python -m data_tools`: the same as `data-tools`."""

from data_tools.cli import entry

if __name__ == "__main__":
    entry()
