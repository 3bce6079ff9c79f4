"""
    sparsities(schedule) -> Vector

The sparsity to reach in each round. A vector of sparsities is a schedule too, from a function `f.(1:n)`; with [`Layerwise`](@ref) a
sparsity, and a schedule's `rate` or `sparsity`, may be a vector with one number per layer.

Throws `ArgumentError` if there are none, if one is outside [0, 1), or if they go down.

# Examples
```jldoctest
julia> sparsities(Exponential(rate = 0.5, rounds = 3))
3-element Vector{Float64}:
 0.5
 0.75
 0.875
```
"""
function sparsities(schedule)
    targets = rounds(schedule)
    isempty(targets) && throw(ArgumentError("schedule must have at least one round"))
    for s in targets
        all(x -> 0 <= x < 1, s) || throw(ArgumentError("schedule must stay in [0, 1), but reaches $s"))
    end
    allequal(map(length, targets)) || throw(ArgumentError("schedule must have as many sparsities in each round, not $targets"))
    for (before, after) in zip(targets, Iterators.drop(targets, 1))
        all(before .<= after) || throw(ArgumentError(
            "schedule must never go down, but $after follows $before: pruned stays pruned"))
    end
    return targets
end

rounds(targets::AbstractVector) = targets
rounds(other) = throw(ArgumentError("schedule must be a schedule, such as OneShot(0.8), or a vector of sparsities, not $other"))

"""
    OneShot(sparsity)

All at once: a single round.
"""
Base.@kwdef struct OneShot{S}
    sparsity::S
end

rounds(schedule::OneShot) = [schedule.sparsity]

"""
    Constant(; rate, rounds)

Each round prunes the share `rate` of the initial weights: `s_k = k * rate`.
"""
Base.@kwdef struct Constant{R}
    rate::R
    rounds::Int
end

rounds(schedule::Constant) = [k .* schedule.rate for k in 1:schedule.rounds]

"""
    Exponential(; rate, rounds)

Each round prunes the share `rate` of what is left: `s_k = 1 - (1 - rate)^k`, the schedule of iterative
magnitude pruning (Frankle & Carbin 2019, arXiv:1803.03635).
"""
Base.@kwdef struct Exponential{R}
    rate::R
    rounds::Int
end

rounds(schedule::Exponential) = [1 .- (1 .- schedule.rate) .^ k for k in 1:schedule.rounds]

"""
    Polynomial(; sparsity, rounds, power = 3)

From 0 to `sparsity`, fast first: `s_k = sparsity * (1 - (1 - k / rounds)^power)`; with `power = 3` the cubic
schedule of Zhu & Gupta 2017 (arXiv:1710.01878).
"""
Base.@kwdef struct Polynomial{S,P<:Real}
    sparsity::S
    rounds::Int
    power::P = 3
end

rounds(schedule::Polynomial) =
    [schedule.sparsity .* (1 - (1 - k / schedule.rounds)^schedule.power) for k in 1:schedule.rounds]

"""
    Cosine(; sparsity, rounds)

From 0 to `sparsity`, slow at both ends: `s_k = sparsity * (1 - cos(π k / rounds)) / 2`.
"""
Base.@kwdef struct Cosine{S}
    sparsity::S
    rounds::Int
end

rounds(schedule::Cosine) = [schedule.sparsity .* (1 - cospi(k / schedule.rounds)) ./ 2 for k in 1:schedule.rounds]
