using PrunableFlux, Test
using PrunableFlux: share, share_items

@testset "threads share work" begin
    for n in (0, 1, 2, 3, 100)
        times = zeros(Int, n)
        share_items((i, item) -> (times[i] += item), fill(1, n))
        @test times == ones(n)
    end
    for wrong in (1, 7, 10) # on whichever thread
        done = zeros(Int, 10)
        @test_throws "number $wrong" try
            share(10) do shares
                for i in shares
                    i == wrong ? error("number $i") : (done[i] += 1; yield())
                end
            end
        catch error
            rethrow(error isa TaskFailedException ? error.task.result : error)
        end
        @test all(<=(1), done) && done[wrong] == 0
    end
end
