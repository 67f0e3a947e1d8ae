"""What every benchmark needs: timing in turns, the record of the machine, stored results, tables."""
