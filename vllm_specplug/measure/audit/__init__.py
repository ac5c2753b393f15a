"""``specplug audit``: is a configuration lossless, greedy-identical and drafter-invariant? Numbers and a verdict.

:mod:`.run` drives engines, inside which :mod:`.worker` draws; :mod:`.statistics` tests the draws, and :mod:`.report`
writes the results.
"""
