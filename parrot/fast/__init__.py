"""The speed-ups: the same numbers, sooner. Skip this folder at first reading.

The lesson's files hold the plain form of every idea. Each file here begins by naming the plain
function that it replaces, why it is faster, what it gained where, and the test that holds the two
equal. The lesson reaches each in one place, marked with `if fast.enabled`.

The programs set `enabled` once, from --plain.
"""

enabled = True
