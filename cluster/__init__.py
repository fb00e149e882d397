"""WHERE it runs: one worker per device, a scheduler without I/O, the driver on Ray."""
