"""What to send to one variant, and when: for one client, or cut into shares for several."""

from dataclasses import dataclass, replace

from loadtest.send.workload import Prompt


@dataclass(frozen=True)
class Batch:
    """The requests of a warm-up or of a block.

    Attributes:
        variant: who gets them.
        prompts: (number in the workload, prompt), in the order in which they leave.
        output_tokens: asked of each.
        concurrency: closed loop: requests in flight; the next one leaves when one comes back.
        due_s: open loop: when each prompt leaves, in seconds from the start, ascending, however
            many are outstanding; None = closed loop.
    """

    variant: str
    prompts: tuple[tuple[int, Prompt], ...]
    output_tokens: int
    concurrency: int
    due_s: tuple[float, ...] | None = None

    def shares(self, num: int) -> list["Batch"]:
        """Cuts it into `num` batches that together do the same; a closed loop needs a place each.

        In a closed loop every share gets prompts in proportion to its places.
        """
        period = self.concurrency if self.due_s is None else num
        return [
            replace(
                self,
                prompts=tuple(
                    prompt
                    for place, prompt in enumerate(self.prompts)
                    if place % period % num == share
                ),
                concurrency=len(range(share, self.concurrency, num)),
                due_s=None if self.due_s is None else self.due_s[share::num],
            )
            for share in range(num)
        ]
