"""The speed-ups: the same numbers, sooner. Skip this folder at first reading.

Each file replaces one plain function of the lesson, which reaches it where it says `fast.enabled`.
The programs set that once, from --plain.
"""

enabled = True
