"""What runs at the start and by the clock. Knows neither stream nor fleet."""
