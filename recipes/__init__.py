"""What comes before and after REINFORCE: models to start from, and judgement at the end."""
