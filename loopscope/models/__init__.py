"""Models: what they all offer, loopscope's own, and anybody else's, wrapped."""
