"""The intake beside its peers: how fast it receives, and at what cost.

Every contestant is a real program in a process of its own, on the same machine, fed the same images by the same
senders in the same round, so that the figures can be compared with each other, and with nothing else.
"""
