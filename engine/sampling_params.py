"""What a request may ask of the sampler.

Defaults are neutral: the front end fills in the checkpoint's own sampling defaults first.
"""

import msgspec

from bezel.engine.errors import InvalidRequest

MAX_LOGPROBS = 20


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True):
    """After `num_tokens` tokens between `open_id` and `close_id` the next token is `close_id`.

    Tokens of several thoughts count together. `is_open`: the prompt has ended within a thought, so
    that the first token counts already.
    """

    num_tokens: int
    open_id: int
    close_id: int
    is_open: bool

    def validate(self, vocab_size: int) -> None:
        """Check every range.

        Raises:
            InvalidRequest: naming `thinking_budget`.
        """
        _check("thinking_budget", self.num_tokens, 0, 2**31 - 1)
        for token_id in (self.open_id, self.close_id):
            _check("thinking_budget", token_id, 0, vocab_size - 1)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling options of one sequence. `top_k = 0` and `top_p = 1` mean no truncation.

    `seed` fixes the draws of this sequence alone, whatever else shares its batch.
    `logit_bias` maps token ids to values added to their logits.
    `logprobs` and `prompt_logprobs` ask for log-probabilities of the drawn tokens, or of the
    prompt's, and of that many of the likeliest beside each; None asks for none.
    `grammar` is an llguidance grammar that the output keeps to, from its first token on.
    A sequence of lower `priority` goes first; of equal ones, those of the `tenant` served least.
    Only sequences of equal `cache_salt` share pages. The first `num_preamble_tokens` of the prompt
    are probably those of other prompts too.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    thinking_budget: ThinkingBudget | None = None
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    num_preamble_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        # Dividing by less than this makes infinities of logits; vLLM draws the same line.
        return self.temperature < 1e-5

    def validate(self, vocab_size: int) -> None:
        """Check every range.

        Raises:
            InvalidRequest: naming the first field that is out of range.
        """
        _check("max_tokens", self.max_tokens, 1, None)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("temperature", self.temperature, 0.0, 2.0)
        _check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check("top_k", self.top_k, 0, 2**63 - 1)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        # Beyond these a float32 logit becomes 0 or infinite, and nothing can be drawn from it.
        _check("repetition_penalty", self.repetition_penalty, 0.001, 1000.0)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.thinking_budget is not None:
            self.thinking_budget.validate(vocab_size)
        _check("priority", self.priority, -(2**31), 2**31 - 1)
        for token_id in self.stop_token_ids:
            _check("stop_token_ids", token_id, 0, vocab_size - 1)
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias", token_id, 0, vocab_size - 1)
            _check("logit_bias", bias, -100.0, 100.0)


def _check(
    name: str, value: float, low: float, high: float | None, *, open_low: bool = False
) -> None:
    # `not (… )` rather than the opposite comparison: NaN must fail too.
    above = value > low if open_low else value >= low
    below = high is None or value <= high
    if above and below and abs(value) != float("inf"):
        return
    bounds = f"{'greater than' if open_low else 'at least'} {low}"
    if high is not None:
        bounds += f" and at most {high}"
    raise InvalidRequest(f"{name} must be {bounds}, got {value}.", param=name)
