"""A proposer of your own: after each token, draft what followed it the last time.

    PYTHONPATH=examples specplug serve MODEL \
        --speculative-config '{"method": "specplug", "proposers": ["my_proposer.LastSuccessor"]}'

Whatever it drafts, the output stays the same token for token; good drafts only make it come sooner.
"""

from itertools import pairwise

from vllm_specplug.proposers import DraftBatch, Proposer


class LastSuccessor(Proposer):
    def propose(self, batch: DraftBatch) -> list[list[int]]:
        drafts = []
        for index, limit in enumerate(batch.max_draft_tokens):
            tokens = batch.context(index).tolist()
            successor = dict(pairwise(tokens))
            draft = [tokens[-1]]
            while len(draft) <= limit and draft[-1] in successor:
                draft.append(successor[draft[-1]])
            drafts.append(draft[1:])
        return drafts
