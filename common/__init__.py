"""What every side of the federation shares; imports none of the other folders."""
