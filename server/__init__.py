"""The server: prepares a federation, runs its rounds, adds up what the clients return, keeps the scores."""
