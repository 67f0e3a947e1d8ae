"""Once per generated token: attention that also returns scores, and a K/V cache whose slots move."""
