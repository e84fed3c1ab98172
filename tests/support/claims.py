"""What claims cores, without any."""


class Claims:
    """Cores that note who asks for them."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def claim(self) -> None:
        self.said.append("claim")

    def release(self) -> None:
        self.said.append("release")
