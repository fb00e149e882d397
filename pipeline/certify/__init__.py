"""From votes to bounds, radii and curves; and which draws an order needs."""
