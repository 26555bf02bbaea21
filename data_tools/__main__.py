from data_tools.cli import entry

entry()
