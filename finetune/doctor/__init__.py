"""`finetune doctor`: whether this launch, these machines and this config will train, before they have to.

table       what a check says (`Row`) and how it is printed
board       what ranks tell each other without collectives, and a watch that ends what hangs
context     what checks share
launch      what the launch asks for, and who is who
hosts       the machines: devices, versions, code, config, clocks
files       the run's folder as all ranks see it
network     bandwidth and latency
pieces      data, model, strategy, reading
steps       two real steps: samples, learning rate, losses
weights     whether all ranks have the same ones
saving      save, load and go on; what a run would find in its folder
memory      what is needed against what is there
examine     the order of the checks
command     the command

A check is a plain function of the `Context` that returns rows; all ranks call it and get the same ones.
"""
