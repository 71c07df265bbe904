"""A user's own package, as the tests see it: it registers environments when it is imported."""

import gymnasium

gymnasium.register("UserReach-v0", entry_point="user_package.reach_env:ReachEnv", max_episode_steps=20)
gymnasium.register(
    "UserTwoCameras-v0",
    entry_point="user_package.two_cameras:TwoCamerasEnv",
    vector_entry_point="user_package.two_cameras:TwoCamerasVectorEnv",
    max_episode_steps=9,
)
