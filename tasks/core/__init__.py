"""Pure decisions: no file, network, clock or environment; numpy only."""
