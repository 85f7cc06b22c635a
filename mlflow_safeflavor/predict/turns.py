"""Turns: the request that is next at the model, and the batch that it shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mlflow_safeflavor.predict.batching import cut_into_batches
from mlflow_safeflavor.predict.state import State
from mlflow_safeflavor.predict.ticket import Ticket

__all__ = ["next_batch"]

# Full batches' worth of a request's pieces that are looked at before each forward. Pieces come in
# order of length, so that more of them would change nothing but the time it takes.
_AHEAD = 4


def next_batch(state: State, tickets: Sequence[Ticket]) -> list[tuple[Ticket, int]]:
    """The batch with the longest piece of the request whose turn it is.

    Each request that waits has the same share of the model's time: one that was served is next once
    as many tokens were run for each of the others, so that long texts come up more seldom than
    short ones. And after one that goes on comes a new one, if there is any: a table of a million
    rows keeps a small request waiting for a forward or two.
    """
    new = [ticket for ticket in tickets if not ticket.served] if state.went_on else []
    first = min(new or tickets, key=lambda ticket: ticket.turn)
    state.went_on = first.served
    # Alone where bits matter: in torch those of a row depend on the rows and the padding around it.
    # And where there is no other: to look for the best batch is a tenth of what this costs a row.
    if state.deterministic or len(tickets) == len(first.waiting) == 1:
        batch = [(first, first.waiting.popleft())]
    else:
        agreeing = [
            first,
            *(ticket for ticket in tickets if ticket.key == first.key and ticket is not first),
        ]
        pool = [
            (ticket, i) for ticket in agreeing for i in ticket.take(_AHEAD * state.max_batch_tokens)
        ]
        costs = [ticket.costs[i] for ticket, i in pool]
        batches = cut_into_batches(costs, state.max_batch_tokens, state.forward_cost)
        # 0 is the longest piece of the first
        chosen = next(set(places) for places in batches if 0 in places)
        batch = [pool[place] for place in sorted(chosen)]
        for place in reversed(range(len(pool))):  # backwards, so that each ticket keeps its order
            if place not in chosen:
                pool[place][0].waiting.appendleft(pool[place][1])
    cost: Counter[Ticket] = Counter()
    for ticket, i in batch:
        cost[ticket] += ticket.costs[i]
    state.spent += state.forward_cost + cost.total()
    for ticket in cost:
        ticket.turn, ticket.served = state.spent + cost[ticket] * len(tickets), True
    return batch
