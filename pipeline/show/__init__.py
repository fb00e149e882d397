"""Tables, reports, cards and logs."""
