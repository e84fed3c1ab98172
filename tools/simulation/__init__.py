"""The production state machines under a seeded clock and network, with faults. `runner.simulate` is the way in."""
