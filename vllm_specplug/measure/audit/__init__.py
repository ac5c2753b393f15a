"""``specplug audit``: is a configuration lossless, greedy-identical and drafter-invariant? Numbers and a verdict.

:mod:`.statistics` knows nothing of engines, :mod:`.worker` runs inside of one, :mod:`.run` drives them, :mod:`.report`
writes what came out.
"""
