"""A user's own package, as the tests see it: it registers one environment when it is imported."""

import gymnasium

gymnasium.register("UserReach-v0", entry_point="user_package.reach_env:ReachEnv", max_episode_steps=20)
