"""A model behind lm-eval's interface: the options of generation, and each request with its own."""

import pytest
from lm_eval.api.instance import Instance

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.lm_eval_model import SngptLM


class Model:
    """Says how it was asked."""

    seq_len = 16

    def generate(self, prompts, progress, **options):
        said = f"{options['until']} {options['max_tokens']} {options['temperature']}"
        return [f"{prompt} {said}" for prompt in prompts]


SAMPLED = {"do_sample": True, "temperature": 2, "top_k": 3, "top_p": 1.0, "max_new_tokens": 4}
GREEDY = {"do_sample": False, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {}),
        ({"until": "\n", "temperature": 0.5}, {"until": ["\n"], "temperature": 0.5}),
        (GREEDY, {}),
        (SAMPLED, {"max_tokens": 4, "temperature": 2.0, "top_k": 3}),
        ({"top_k": -1}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
    ],
)
def test_options_of_generation(given, wanted):
    default = {"until": [], "max_tokens": 8, "temperature": 0.0, "top_k": 0}  # half of T
    assert SngptLM(Model())._options(given) == default | wanted


@pytest.mark.parametrize(
    "given", [{"num_beams": 4}, {"temperature": 1.0, "top_p": 0.9}, {"max_length": 8}]
)
def test_options_that_are_not_supported_are_named(given):
    with pytest.raises(UserError, match=f"{list(given)[-1]} = .*not supported"):
        SngptLM(Model())._options(given)


def test_each_request_is_served_with_its_own_options():
    short = {"until": ["."], "max_gen_toks": 2}
    long = {"until": ["x"], "max_gen_toks": 5, "temperature": 0.5}
    asked = [("a", short), ("b", long), ("c", long), ("d", short)]
    requests = [Instance("generate_until", {}, given, i) for i, given in enumerate(asked)]
    got = SngptLM(Model()).generate_until(requests)
    assert got == ["a ['.'] 2 0.0", "b ['x'] 5 0.5", "c ['x'] 5 0.5", "d ['.'] 2 0.0"]
