"""Servers of experts: started here, and tried."""
