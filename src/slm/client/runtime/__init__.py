"""The client's own thread, and the clock, log and callbacks that go with it."""
