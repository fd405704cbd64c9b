"""What runs at the start and periodically. Knows neither stream nor fleet."""
