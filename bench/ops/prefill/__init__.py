"""Operations once per request, on vision tokens: sizes, cases, what others do, and the floor of each."""
