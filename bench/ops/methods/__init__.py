"""The ops that methods of other papers are made of."""
