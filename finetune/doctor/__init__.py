"""`finetune doctor`: whether this launch, these machines and this config will train, before they have to.

table       what a check says (`Row`) and how it is printed
board       what ranks tell each other without collectives, and a watch that ends what hangs
context     what checks share
launch      who is who, on which machines, with which versions
files       the run's folder as all ranks see it
network     bandwidth and latency
training    data, model, two real steps, save and resume
memory      what is needed against what is there
examine     the order of the checks
command     the command

A check is a plain function of the `Context` that returns rows; all ranks call it and get the same ones.
"""
