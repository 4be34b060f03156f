"""The box and its parts beside their peers: how fast, at what cost, and whether what comes out is right.

Every contestant does the same work on the same machine in the same round, so that the figures can be compared with
each other, and with nothing else. A receiver is a real program in a process of its own, fed by the same senders.
"""
