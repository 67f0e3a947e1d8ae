"""Operations once per generated token, on the K/V cache."""
