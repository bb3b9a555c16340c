"""How long a model may think before its thought is closed for it."""

from bezel.engine.sampling_params import ThinkingBudget


class ThoughtLimit:
    """Counts the tokens of one sequence's thoughts, of all of them together.

        open_id  t₁ t₂ … tₙ  close_id  the answer …
                 counted     forced, if n tokens are the budget and the model didn't close itself

    Once the budget is spent a thought that opens anew is closed at once.
    """

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._is_open = budget.is_open
        self._num_left = budget.num_tokens

    @property
    def forced_id(self) -> int | None:
        """The token that has to come next; None while any may."""
        return self._budget.close_id if self._is_open and self._num_left <= 0 else None

    def accept(self, token_id: int) -> None:
        """Take note of the token that came next."""
        if not self._is_open:
            self._is_open = token_id == self._budget.open_id
        elif token_id == self._budget.close_id:
            self._is_open = False
        else:
            self._num_left -= 1
