"""One adapter a provider; each is imported when it is first used, and its SDK with it."""
