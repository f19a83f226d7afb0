"""Any other optimizer's own step, recorded and differentiated."""
