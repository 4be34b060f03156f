"""Signed releases: the bundle, and what puts it onto a box.

`errors`, `minisign`, `bundle`, `box` and `installer` travel in the bundle and run on a box that has nothing of scanside
yet: they import the standard library, `cryptography` and one another, nothing else.
"""
