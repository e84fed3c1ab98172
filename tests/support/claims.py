"""What claims cores, without any."""


class Claims:
    """Cores that note who asks for them."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def claim(self) -> None:
        self.said.append("claim")

    def release(self) -> None:
        assert self.said[-1:] != ["release"], "given back twice"
        self.said.append("release")
