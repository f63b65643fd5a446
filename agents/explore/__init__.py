"""ExoRL's unsupervised data collectors: agents that explore with intrinsic rewards, and write their episodes.

All but `random` share one learner (`agents.explore.learner`). Each algorithm is an intrinsic reward, in its own file:

    random          none: uniform actions
    rnd             the error of predicting a random network (Burda et al. 2018, arXiv 1810.12894)
    icm             the error of predicting the next state (Pathak et al. 2017, arXiv 1705.05363)
    disagreement    the variance of several such predictions (Pathak et al. 2019, arXiv 1906.04161)
    icm_apt         the distance to the nearest neighbours in a batch (Liu and Abbeel 2021, arXiv 2103.04551)
    proto           the distance to examples of learnt prototypes (Yarats et al. 2021, arXiv 2102.11271)
    diayn           how well a skill is recognised from its states (Eysenbach et al. 2018, arXiv 1802.06070)
    smm             the rarity of states, which skills divide up (Lee et al. 2019, arXiv 1906.05274)
    aps             distance, and features along a skill vector (Liu and Abbeel 2021, arXiv 2108.13956)
    td3             the reward of the task: gives a learning history instead of exploration

Equations and settings are those of the unsupervised reinforcement learning benchmark, URLB (Laskin et al. 2021, arXiv
2110.15191), with which ExoRL's data were made (Yarats et al. 2022, arXiv 2201.13425). Each algorithm's file says
where the papers differ.
"""
