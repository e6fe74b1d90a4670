"""Search written the obvious way, to compare with: no batches, no caches; and what its tests share."""

import math

from bonnx.runtime.search import Choice, Policy, search
from tests.runtime.search.tabular import END, PROMPT, STEP


def run(table, method, budget, *, answers=None, vote=None, scorer=None, deadline=None, policy=None, **options):
    return search(table.engine, PROMPT, method, budget, answers, vote, scorer, deadline, policy, options)


def first(tokens):
    """What a completion of the table votes for: its first token, none if that is 0."""
    return tokens[0] or None


class Reference:
    """Search without batches, caches or pending tokens: prefixes, and the table's draws by number."""

    def __init__(self, table):
        self.table, self.numbers, self.sampled = table, 0, 0

    def number(self):
        self.numbers += 1
        return self.numbers - 1

    def ended(self, prefix):
        return bool(prefix) and (prefix[-1] == END or len(prefix) == self.table.longest)

    def step(self, prefix, number, temperature=1.0):
        while True:
            prefix = (*prefix, self.table.draw(prefix, number, temperature))
            self.sampled += 1
            if self.ended(prefix):
                return prefix
            if prefix[-1] == STEP and self.table.draw(prefix, number, temperature) != END:
                return prefix

    def whole(self, prefix, number):
        while not self.ended(prefix):
            prefix = self.step(prefix, number)
        return prefix

    def beam(self, sizes, width, rounds=40, lookahead=0, distinct=True):
        active = [(group, (), self.number()) for group, size in enumerate(sizes) for _ in range(size)]
        left, done = list(sizes), []
        for round_ in range(rounds + 1):
            grow = self.whole if round_ == rounds else self.step
            active = [(group, grow(prefix, number), number) for group, prefix, number in active]
            values = []
            for _, prefix, _ in active:
                end = prefix
                if lookahead and not self.ended(prefix):
                    self.number()
                    for _ in range(lookahead):
                        if not self.ended(end):
                            end = self.step(end, 0, temperature=0)
                values.append(self.table.score(end))
            done += [prefix for _, prefix, _ in active if self.ended(prefix)]
            following = []
            kept = []
            for group in range(len(sizes)):
                mine = [i for i, row in enumerate(active) if row[0] == group]
                left[group] -= sum(self.ended(active[i][1]) for i in mine)
                going = sorted((i for i in mine if not self.ended(active[i][1])), key=lambda i: -values[i])
                if distinct:
                    firsts = {active[i][1]: i for i in sorted(going, reverse=True)}
                    going = [i for i in going if i in firsts.values()] + [i for i in going if i not in firsts.values()]
                kept.append(going[: math.ceil(left[group] / width)])
            for group in [g for g in dict.fromkeys(row[0] for row in active) if kept[g]]:
                for place, i in enumerate(kept[group]):
                    share = left[group] // len(kept[group]) + (place < left[group] % len(kept[group]))
                    _, prefix, number = active[i]
                    following += [(group, prefix, number)] + [(group, prefix, self.number()) for _ in range(share - 1)]
            if not following:
                return done
            active = following
        return done


def sequences(result):
    return [tuple(candidate.tokens.tolist()) for candidate in result.candidates]


def policy_of(method, options=None, probe=4, budget=8):
    return Policy(1, "table", "0" * 64, probe, [], {str(budget): [Choice(method, options or {})]})


METHODS_OF_TREES = {
    "best_of_n": {},
    "self_certainty": {},
    "adaptive": {"price": 1e-9},
    "pruned": {"every": 3},
    "beam": {"width": 2},
    "lookahead": {"width": 1, "steps": 1},
    "dvts": {"width": 2},
}
