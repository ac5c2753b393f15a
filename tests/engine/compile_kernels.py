"""Compiles the proposers' kernels once, in two processes, so that not every test worker compiles them."""

from concurrent.futures import ProcessPoolExecutor

from vllm_specplug.drafting.drafting import Drafting
from vllm_specplug.proposers import ProposerContext
from vllm_specplug.settings.model import parse_settings


def compile_all(proposers: list[str]) -> None:
    Drafting(parse_settings({"proposers": proposers}), ProposerContext(4096, 4)).warm_up()


if __name__ == "__main__":
    # The automaton of "suffix" takes as long to compile as all other kernels.
    with ProcessPoolExecutor(2) as processes:
        list(processes.map(compile_all, [["suffix"], ["ngram", "jacobi", "lookahead", "recycling"]]))
